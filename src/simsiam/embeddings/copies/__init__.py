"""What a copy is, in detail.

`duplicates` chooses pairs of images by their thumbnails; this package decides about them.
`originals` reads the image files again, `distance` compares two images tile by tile, and `crops`
finds cropped and mirrored copies. Start reading with `distance`.
"""
