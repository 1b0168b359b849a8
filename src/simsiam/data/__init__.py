"""From encoded images to batches of views, as functions of (seed, step).

This package owns decoding, storage by position, the evaluation transform, augmentation and
batching. It imports `config`, `distributed` and `utils`, and never `model`. Start with `images` and
`views`; `batches` combines them. To keep images in a new place, write a class like those in
`storage`.
"""
