"""The loop, the offline and the asynchronous engine, and the tokenizer. Knows no HTTP."""
