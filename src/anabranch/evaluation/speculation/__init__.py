"""How well speculative decoding works: bounds on acceptance, real laws and traces, their replay."""
