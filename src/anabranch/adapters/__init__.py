"""Adapters: small trainable changes to a frozen base, as PEFT methods, in PEFT's checkpoint format."""
