"""What a person looks at: the report of runs, the preview of views, the comparison of runs.

This package owns pictures and web pages made of run folders and embeddings. It imports `embeddings`, `runs` and what
stands below them, and nothing that trains. Start with `report`.
"""
