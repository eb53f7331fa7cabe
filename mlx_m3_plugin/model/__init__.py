"""The MiniMax-M3 text model.

Knows arrays and modules; what a host library owns comes in through ``Host``.
"""
