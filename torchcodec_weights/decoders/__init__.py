"""The one way in: who decodes a matrix, and where (`choice`)."""
