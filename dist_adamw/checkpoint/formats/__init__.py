"""Training states of other libraries: import and export."""
