"""The command line. Imports every other room of the core."""
