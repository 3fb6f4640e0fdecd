"""`python -m gold_jax.serve`: an OpenAI-compatible HTTP server with continuous batching.

`/v1/models`, `/v1/completions` (with log-probabilities of prompts) and `/v1/chat/completions`; see docs/serving.md.
"""

import signal
import socket
import sys
import threading
from collections.abc import Sequence

from gold_jax.cli import load_reader, require, run, show
from gold_jax.config import GOLDConfig, ModelArguments
from gold_jax.config.fields import Settings, flag, like
from gold_jax.config.parsing import parse_args
from gold_jax.quickstart import shown_name
from gold_jax.values import AT_LEAST_ONE, QUANTIZATIONS, Range

_LAST_SECONDS = 5  # that running requests have to finish when the server stops


# fmt: off
class ServeArguments(Settings):
    """The address of `gold_jax.serve`, and its sizes."""

    host: str = flag("127.0.0.1",
        "The address to listen on. There is no authentication: with another one than 127.0.0.1 other machines can use the model.")
    port: int = flag(8000, "The port; 0: any free one.", range=Range("from 0 to 65535", lambda v: 0 <= v <= 65535))
    served_model_name: str | None = flag(None, "The name of the model in requests; none: --model_name_or_path.")
    tokenizer_name_or_path: str | None = flag(None, "The tokenizer; none: the one beside the model.")
    batch_size: int = flag(16, "How many sequences are decoded at once.", range=AT_LEAST_ONE)
    queue_size: int = flag(256, "How many sequences may wait; others are answered 503 with Retry-After.", range=AT_LEAST_ONE)
    max_length: int | None = flag(None,
        "Most tokens of a sequence with its prompt; none: the model's max_position_embeddings (with LongRoPE its "
        "original_max_position_embeddings), at most 4096.", range=AT_LEAST_ONE)
    quantization: str = flag("none",
        "int8: decode with weights of 8 bits, which are read in half the time; prompts are scored with the original ones. "
        "int8_kv_cache: keys and values of earlier tokens in 8 bits, too.",
        choices=QUANTIZATIONS)
    trust_remote_code: bool = like(GOLDConfig, "trust_remote_code")
    bf16: bool | None = like(GOLDConfig, "bf16")


# fmt: on
def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, loads the model and serves it until Ctrl-C or SIGTERM."""
    model, args, notices = parse_args(argv, ModelArguments, ServeArguments, prog="gold_jax.serve", doc=__doc__)
    require(model.model_name_or_path, "model_name_or_path", "a folder or a hub id")
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'gold_jax[serve]'") from None
    with _listen(args.host, args.port) as listener:
        show(notices)
        from gold_jax.bucketing import power_of_two
        from gold_jax.serving.app import create_app
        from gold_jax.serving.batcher import COMPILED_LENGTH, Batcher, longest_sequence

        loaded = load_reader(model, args, args.tokenizer_name_or_path, special_tokens=True, one_device=True)
        decoder, chat = loaded.model, loaded.chat_tokenizer
        sizes = {"rows": args.batch_size, "queue_size": args.queue_size, "quantization": args.quantization}
        longest = args.max_length or longest_sequence(decoder)
        decoder.config.check_decode_length(
            power_of_two(longest), "the slots of the cache (a power of two) for --max_length"
        )
        batcher = Batcher(decoder, chat.stop_ids, max_length=longest, **sizes)
        batcher.compile(COMPILED_LENGTH)
        name = args.served_model_name or shown_name(model.model_name_or_path)
        app = create_app(chat, batcher, name, decoder.config.vocab_size)
        options = {"log_level": "warning", "timeout_graceful_shutdown": 2 * _LAST_SECONDS}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        host, port = listener.getsockname()[:2]
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print(
                f"note: everyone who reaches {args.host} can use the model; there is no authentication", file=sys.stderr
            )
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {name} at http://{shown}:{port}/v1, up to {longest} tokens; Ctrl-C ends it",
            file=sys.stderr,
            flush=True,
        )
        stop = server.handle_exit

        def stop_soon(*received):  # unfinished requests get an error then
            if not server.should_exit:
                timer = threading.Timer(_LAST_SECONDS, batcher.close)
                timer.daemon = True
                timer.start()
            stop(*received)

        server.handle_exit = stop_soon
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has stopped
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            batcher.close()
        print("stopped", file=sys.stderr)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded; OSError says why it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from None


if __name__ == "__main__":
    run("gold_jax.serve", main)
