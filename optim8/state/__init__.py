"""State of parameters: its layout, allocation, conversion, shards. It knows no optimizer."""
