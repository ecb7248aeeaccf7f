"""Testbeds of contrastive decoding: made tasks with a wrong idiom, and real code read along."""
