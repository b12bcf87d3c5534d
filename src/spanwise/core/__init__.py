"""Nouns: frozen values that know nothing of torch. Everything else is a verb over them."""
