"""The parts that the scripts share. Importing any of them does nothing visible."""
