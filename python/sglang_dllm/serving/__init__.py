"""Checks of the requests that SGLang's routes and its Python engine take."""
