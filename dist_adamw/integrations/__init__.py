"""Integrations, one package per library. Each library is imported only where it is used."""
