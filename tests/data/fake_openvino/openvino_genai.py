"""A pipeline with OpenVINO GenAI's interface that counts upwards from the last prompt token."""

from types import SimpleNamespace

from openvino import Tensor


class SchedulerConfig(SimpleNamespace):
    pass


class GenerationConfig(SimpleNamespace):
    max_new_tokens: int


class Handle:
    def __init__(self, last: int, left: int) -> None:
        self.last, self.left = last, left
        self.unread: list[int] = []

    def can_read(self) -> bool:
        return bool(self.unread)

    def read(self) -> dict[int, SimpleNamespace]:
        ids, self.unread = self.unread, []
        return {0: SimpleNamespace(generated_ids=ids)}

    def stop(self) -> None:
        self.left = 0


class ContinuousBatchingPipeline:
    def __init__(
        self, folder: str, config: SchedulerConfig, device: str, properties: dict[str, object]
    ) -> None:
        self.running: list[Handle] = []

    def add_request(self, key: int, prompt: Tensor, config: GenerationConfig) -> Handle:
        self.running.append(Handle(prompt.rows[0][-1], config.max_new_tokens))
        return self.running[-1]

    def has_non_finished_requests(self) -> bool:
        return any(handle.left for handle in self.running)

    def step(self) -> None:
        for handle in self.running:
            if handle.left:
                handle.left -= 1
                handle.last += 1
                handle.unread.append(handle.last % 384)
        self.running = [handle for handle in self.running if handle.left]
