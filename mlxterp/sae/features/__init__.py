"""What features respond to and what they do."""
