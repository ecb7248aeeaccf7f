"""Small problems on which claims are measured in seconds, with exact data and real models."""
