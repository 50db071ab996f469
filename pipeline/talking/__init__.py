"""Reading and answering: decoding, retrieval, generation, the decision between them."""
