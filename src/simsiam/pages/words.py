"""The words of a run's progress line and of its report; docs/glossary.md has the same texts."""

WORDS = {
    "Epoch": "As many steps as it takes to see each image once.",
    "Loss": "What training makes small. SimSiam's is the negative cosine of p and t: -1 is perfect,"
    " 0 means unrelated. Alone it does not show a collapse.",
    "std": "How much the outputs z of a batch differ, each divided by its length: their standard"
    " deviation times √d. It is 1 if they are spread evenly, and 0 if all are equal.",
    "Rank": "The effective rank: how many directions the features h or the outputs z use. 1 is a"
    " line. Near 1 is a collapse; above that, more is not always better.",
    "kNN": "The accuracy of the k-nearest-neighbor classifier on images that were held out: each"
    " gets the class that most of its nearest images have.",
    "View retrieval": "The share of views whose nearest neighbor is the other view of the same"
    " image. It needs no labels. In the progress line: views.",
    "Wait": "The share of the time in which training waited for images.",
    "Learning rate": "The size of the steps, as the recipe plans it.",
    "Collapse": "All images get the same output, or outputs on one line. The loss is then low and"
    " the features are useless.",
    "Learned little": "A verdict: nothing collapsed, but the features are not better than pixels, a"
    " color histogram or the untrained network.",
    "Label-free score": "A number that compares features without labels: how well an image, and its"
    " neighborhood, are recognized in another view.",
    "Patches": "Features from small pieces of the images, without a network.",
}
PROGRESS_WORDS = ("Epoch", "Loss", "std", "kNN", "View retrieval", "Wait")
