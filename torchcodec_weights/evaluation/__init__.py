"""Quality of compressed models, and real models to measure."""
