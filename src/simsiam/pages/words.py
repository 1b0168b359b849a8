"""The words of a run's progress line and of its report; docs/glossary.md has the same texts."""

WORDS = {
    "Epoch": "A part of the training in which each image is seen once.",
    "Loss": "The number that training makes smaller. SimSiam's loss is the negative cosine of p and"
    " t: -1 is best, 0 means that p and t have nothing in common. A low loss can also be a"
    " collapse.",
    "std": "How much the outputs z of a batch differ. Each z is divided by its length; then the"
    " standard deviation over the batch is multiplied by √d. It is 0 if all outputs are equal, and"
    " 1 if they are spread evenly.",
    "Rank": "The effective rank: how many directions the features h or the outputs z use. Near 1"
    " means a collapse. A rank that is higher than another is not always better.",
    "kNN": "The accuracy of the k-nearest-neighbor classifier, on images that were held out: each"
    " image gets the class that most of the images with similar features have.",
    "View retrieval": "How often a view of an image is more similar to another view of the same"
    " image than to views of other images. It needs no labels. In the line that a training prints:"
    " views.",
    "Wait": "The share of the time in which the training waited for images.",
    "Learning rate": "How large the steps of the training are.",
    "Collapse": "All images get the same output z, or outputs on one line. Then z says little or"
    " nothing about the images, although the loss is low. The features h may still be of use.",
    "Learned little": "A verdict. Nothing has collapsed, but the features are not better than"
    " pixels, a color histogram, or the network before training.",
    "Label-free score": "A number that compares features without labels. It is high if an image is"
    " recognized in another view of it, and if its nearest neighbors are the same in that view.",
    "Patches": "Features from small pieces of the images, computed without a network.",
}
PROGRESS_WORDS = ("Epoch", "Loss", "std", "kNN", "View retrieval", "Wait")
