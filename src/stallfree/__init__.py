"""stallfree: an LLM server that never pauses a running answer (Sarathi-Serve, OSDI'24)."""
