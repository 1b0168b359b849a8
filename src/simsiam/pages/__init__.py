"""Pages and pictures for people: reports of runs, previews of views, comparisons of runs.

This package owns everything that turns run folders, sources and embeddings into web pages, PNG
files and printed tables. It may import `embeddings`, `runs` and the packages listed before them,
and nothing that trains or evaluates. Start reading with `report`, which writes a page about one or
several runs: `thumbnails` and `image_map` prepare the images it shows, and `page/` holds its HTML,
CSS and JavaScript.
"""
