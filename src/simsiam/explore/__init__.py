"""The command `explore`: a local web application to look at, search, label and clean up images.

This package serves one embedding file to the browser of the same machine. It writes two CSV files
beside the embedding, labels and decisions, and never touches an image. Start reading with
`explore` (the command), `session` (what the server knows) and `server` (what the browser may ask).
The folder `page` holds what the browser runs.
"""
