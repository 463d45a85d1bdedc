"""Arrays in, numbers out: the metrics of retrieval and classification, and search indices. The only home of faiss."""
