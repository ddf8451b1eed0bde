"""Stands in for OpenVINO's tensors in tests of bench/peers/openvino_front.py."""


class Tensor:
    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
