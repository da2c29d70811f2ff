"""What turns texts into vectors, and the record of how it does."""
