"""Use of a finished model: loading, prefill, generation, states, chat, serving, export."""
