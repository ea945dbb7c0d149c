"""What a model does once it is there: reading long texts, generating, states, chat, serving, export."""
