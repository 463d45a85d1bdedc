"""Arrays in, numbers out: retrieval and what a person looks at. The only home of faiss."""
