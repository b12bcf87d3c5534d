"""Its place puts this folder on the import path: cases that several test folders share lie beside it."""
