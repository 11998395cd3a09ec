"""Readers of foreign bytes, tried with files that hypothesis makes: `make fuzz`; found cases are in `corpus/`."""
