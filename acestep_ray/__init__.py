"""Training for the ACE-Step v1 music model on Ray."""

__version__ = "0.1.0"
