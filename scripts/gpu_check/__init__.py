"""What only a GPU can show, in one command: `python -m scripts.gpu_check` tests, proves and measures on this device."""
