"""The quantizer measured beside stock AutoAWQ: time, memory and quality, with one committed command."""
