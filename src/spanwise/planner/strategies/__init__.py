"""Strategies that divide layers and rows among devices, from one device to hybrid pipelines and servers."""
