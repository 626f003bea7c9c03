"""What the package asks of the operating system: files, threads, terminals, settings."""
