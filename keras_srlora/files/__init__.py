"""Files that are checked as a whole and written whole or not at all."""
