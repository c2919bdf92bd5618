"""The laws, one a file. Importing a file registers its pattern."""
