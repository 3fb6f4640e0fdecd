"""The flags of a server that writes the student's completions: TRL's, and the few that are needed beside them."""

from __future__ import annotations

import dataclasses

from .fields import flag


@dataclasses.dataclass(kw_only=True)
class ServerFlags:
    """Which server writes the student's completions, and how it gets the student's weights; without `use_vllm` none."""

    use_vllm: bool = flag(
        False, "With --vllm_mode server: have a running server write the student's completions in training."
    )
    vllm_mode: str = flag(
        "colocate",
        "server: the one at the address below (not TRL's own `trl vllm-serve`, which speaks another language). colocate: "
        "the built-in sampler, which always runs where the student is trained.",
        choices=("colocate", "server"),
    )
    vllm_server_base_url: str | None = flag(None, "The server's address; none: made of host and port.")
    vllm_server_host: str = flag("0.0.0.0", "The server's host.")
    vllm_server_port: int = flag(8001, "The server's port (vLLM's own default is 8000, SGLang's 30000).")
    vllm_server_timeout: float = flag(
        240.0, "Seconds to wait for each of the server's answers, and for a server that is not up yet."
    )
    vllm_sync_frequency: int = flag(1, "Updates after which the server gets the student's weights anew.")
    rollout_server: str = flag(
        "vllm",
        "The kind of server: `vllm serve` (0.16 or newer, started with VLLM_SERVER_DEV_MODE=1 in its environment), or SGLang. "
        "If it wants a key, put it into the environment as VLLM_API_KEY.",
        choices=("vllm", "sglang"),
    )
    rollout_weights_dir: str | None = flag(
        None,
        "Folder through which weights go to the server, which must be able to read it under the same absolute path; none: "
        ".rollout_weights in output_dir.",
    )
    rollout_sync_first: bool = flag(
        True,
        "Give the server the student's weights before the first completions; false: it has been started with them.",
    )

    @property
    def server_url(self) -> str | None:
        """The address of the server that writes the student's completions; None where the built-in sampler does."""
        if not (self.use_vllm and self.vllm_mode == "server"):
            return None
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    def check_server(self) -> list[str]:
        """A notice where the built-in sampler stands in for TRL's.

        Raises:
            ValueError: an address that is none.
        """
        if not 1 <= self.vllm_server_port <= 65535:
            raise ValueError(f"--vllm_server_port is {self.vllm_server_port}; it must be between 1 and 65535.")
        url = self.vllm_server_base_url
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"--vllm_server_base_url is {url!r}; it must be an address such as http://localhost:8000.")
        if not self.use_vllm or self.server_url:
            return []
        return [
            "--use_vllm: The built-in sampler writes the completions, on the training devices and with the current "
            "weights; --vllm_mode server has a running vLLM or SGLang write them."
        ]
