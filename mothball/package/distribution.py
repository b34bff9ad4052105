"""Requests to one registry (OCI distribution specification): who asks, how long, and what every answer means.

The client library (oras) knows tokens and challenges; its own transfers hold whole blobs in memory, sleep for minutes
between tries and know no time limits, so requests are sent here. Its `Registry` brings the session and the authentication.
Nothing that is raised or logged holds a URL, a header or a body: URLs of uploads and of redirects are capabilities.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar
from urllib.parse import urljoin

import oras.auth.utils
import oras.logger
import oras.provider
import requests
import urllib3

from mothball import __version__
from mothball.errors import Corrupt, MothballError, NotFound, OperationFailed, RegistryDenied, RegistryUnavailable
from mothball.package.credentials import find_login
from mothball.package.reference import Reference, api_host, is_insecure
from mothball.package.wire import ANSWER_LIMIT, CONNECT_SECONDS, PIECE, Adapter, Pace, Stalled, Tick, origin
from mothball.settings import Settings
from mothball.store.foreign import read_json

READ_SECONDS: Final = 60.0
"""Longest wait for a registry without anything to speak of; one that stores a blob may take its time over the last request."""
TRIES: Final = 5
"""How often something is tried without any progress before the registry counts as down."""
PAUSE_SECONDS: Final = 0.5
"""The first pause between two tries; it doubles each time."""
PAUSE_MAX_SECONDS: Final = 20.0
MANIFEST_LIMIT: Final = 4 * 1024**2
"""What the specification asks of registries to accept, and none has to."""
REDIRECTS: Final = 10
_DIGITS: Final = 18
_CODE: Final = re.compile(r"[A-Z][A-Z_]{0,63}\Z")
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_SERVER_FAULT: Final = 500
_NO_LOGIN: Final = frozenset({401, 403})

Body = Callable[[], Any]
T = TypeVar("T")


class Distribution:
    """One repository of one registry. Use it in a ``with`` block, from one thread.

    `RegistryUnavailable` (retryable) when it cannot be reached or is in trouble, `RegistryDenied` when it wants another
    login, `ConfigError` when docker's config file is wrong.
    """

    def __init__(self, reference: Reference, settings: Settings) -> None:
        self.reference = reference
        self.registry = reference.registry
        self.repository = reference.repository
        self._config = settings.docker_config
        insecure = is_insecure(reference.registry, settings)
        self._scheme = "http" if insecure else "https"
        host = api_host(reference.registry)
        self._base = f"{self._scheme}://{host}"
        # Their own logs go to stderr and hold bodies of answers, and URLs that are capabilities.
        oras.logger.logger.set_level(logging.CRITICAL + 1)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL + 1)
        self._oras = oras.provider.Registry(hostname=host, insecure=insecure)
        self._session: requests.Session = self._oras.session
        self._pace = Pace(READ_SECONDS)
        self._adapter = Adapter(self._pace, secure=not insecure)
        self._adapter.trusted = {origin(self._base)}
        self._session.mount("http://", self._adapter)
        self._session.mount("https://", self._adapter)
        # Without an `auth` of its own a session takes one from ~/.netrc and overrides what docker's config file says.
        self._session.auth = _unchanged
        self._session.headers.update({"User-Agent": f"mothball/{__version__}", "Accept-Encoding": "identity"})
        login = find_login(settings.docker_config, reference.registry)
        self._login = login is not None
        if login is not None:
            self._oras.auth.set_basic_auth(login.user, login.password)
        self._authorization = ""

    @property
    def tick(self) -> Tick:
        """Called every moment while the registry is waited for; what it raises ends the wait."""
        return self._pace.tick

    @tick.setter
    def tick(self, call: Tick) -> None:
        self._pace.tick = call

    def __enter__(self) -> Distribution:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.close()

    # -- requests ------------------------------------------------------------------------------------------------------

    def url(self, path: str) -> str:
        """The URL of ``<repository>/<path>``."""
        return f"{self._base}/v2/{self.repository}/{path}"

    def absolute(self, location: str, base: str = "", what: str = "uploads") -> str:
        """The URL that a ``Location`` in an answer of `base` means. Refused when it leads from TLS to plain HTTP."""
        try:
            url = urljoin(base or self._base, location)
        except ValueError:
            url = ""
        scheme, host = origin(url)
        if location and host and scheme in {self._scheme, "https"}:
            return url
        where = "to an address without TLS" if scheme == "http" and host else "to what is no address of HTTP"
        reason = f"registry {self.registry} sends {what} {where}"
        raise OperationFailed(reason=f"{reason}; the proxy in front of it should tell it its own address")

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        expected: frozenset[int] | set[int],
        stream: bool = False,
    ) -> requests.Response:
        """One request, with a login when the registry asks for one; `body` makes the body anew for each sending.

        An answer whose status is not in `expected` is `RegistryUnavailable`, `RegistryDenied` or `OperationFailed`.
        """
        response = self._send(method, url, headers, body)
        if response.status_code in _NO_LOGIN and self._is_own(response.url) and self._authenticate(response):
            response.close()
            response = self._send(method, url, headers, body)
        status = response.status_code
        if status in expected:
            if not stream:
                self._short(response)
            return response
        try:
            self._fail(response, status)
        finally:
            response.close()
        raise AssertionError("unreachable")  # pragma: no cover

    def _send(self, method: str, url: str, headers: Mapping[str, str] | None, body: Body | None) -> requests.Response:
        """One request; where only something is asked for, its redirects are followed, with the login for the registry alone."""
        for _ in range(REDIRECTS + 1):
            own = {"Authorization": self._authorization} if self._authorization and self._is_own(url) else {}
            data = body() if body is not None else None
            try:
                response = self._session.request(
                    method, url, headers={**(headers or {}), **own}, data=data, stream=True, allow_redirects=False
                )
            except requests.ConnectionError as error:
                raise self.unavailable(error) from None
            except requests.RequestException as error:
                raise self._no_address(error) from None
            except (ValueError, urllib3.exceptions.HTTPError):  # what a redirect that is no URL makes of the library
                raise self._no_address() from None
            if method not in {"GET", "HEAD"} or not response.is_redirect:
                return response
            response.close()
            url = self.absolute(response.headers["Location"], url, "requests on")
        reason = f"registry {self.registry} sends requests on more than {REDIRECTS} times, perhaps in a circle"
        raise OperationFailed(reason=f"{reason}; look at its storage redirects and at the proxy in front of it")

    def _no_address(self, error: requests.RequestException | None = None) -> MothballError:
        if error is None or isinstance(error, (ValueError, requests.TooManyRedirects)):
            return OperationFailed(reason=f"registry {self.registry} sends requests on to what is no address of HTTP")
        return self.unavailable(error)

    def _is_own(self, url: str) -> bool:
        """True for the registry's own address: credentials are for nobody else."""
        return origin(url) == origin(self._base)

    def _short(self, response: requests.Response) -> bytes:
        """The beginning of an answer that is short when it is honest. Read also when it says nothing: the line is used again."""
        data = bytearray()
        with response:
            for piece in self.pieces(response, ANSWER_LIMIT):
                data += piece
                if len(data) >= ANSWER_LIMIT:
                    break
        return bytes(data[:ANSWER_LIMIT])

    def _authenticate(self, response: requests.Response) -> bool:
        """Answer a challenge; True when it is worth sending the request again."""
        schemes = {
            part.partition(" ")[0].lower(): part
            for part in re.split(r",\s*(?=(?:Basic|Bearer)\b)", response.headers.get("Www-Authenticate", ""), flags=re.IGNORECASE)
        }
        if "bearer" in schemes:
            return self._token(response, schemes["bearer"])
        if "basic" in schemes and self._login and not self._authorization:
            self._authorization = f"Basic {self._oras.auth._basic_auth}"
            return True
        return False

    def _token(self, response: requests.Response, challenge: str) -> bool:
        realm = oras.auth.utils.parse_auth_header(challenge).realm or ""
        place = origin(realm)
        if place[0] not in {self._scheme, "https"} or not place[1]:
            raise RegistryDenied(registry=self.registry, reason="its token server is not reached by TLS, so no login is sent there")
        response.headers["Www-Authenticate"] = challenge
        before = self._authorization
        self._adapter.trusted = {origin(self._base), place}
        try:
            headers, changed = self._oras.auth.authenticate_request(response, {}, refresh=True)
        except requests.exceptions.InvalidJSONError:
            raise RegistryUnavailable(registry=self.registry, reason="its token server gave no token that can be read") from None
        except requests.RequestException as error:
            raise self.unavailable(error) from None
        except MothballError:  # from the tick: the work is not wanted any more
            raise
        except Exception:  # the library trusts what a token server says to have the right form
            raise RegistryUnavailable(registry=self.registry, reason="its token server gave no token that can be read") from None
        finally:
            self._adapter.trusted = {origin(self._base)}
        if not changed:
            if self._adapter.last_status in _TRANSIENT:
                raise RegistryUnavailable(registry=self.registry, reason=f"its token server answers {self._adapter.last_status}")
            return False
        authorization = str(headers["Authorization"])
        if not (authorization.isascii() and authorization.isprintable()):
            raise RegistryUnavailable(registry=self.registry, reason="its token server gave a token that fits no header")
        self._authorization = authorization
        return self._authorization != before

    def _fail(self, response: requests.Response, status: int) -> None:
        said = f"{status}{self._codes(response)}"
        if status in _TRANSIENT or status > _SERVER_FAULT:
            wait = whole(response.headers.get("Retry-After", "")) or 0
            raise RegistryUnavailable(registry=self.registry, reason=f"it answers {said}", retry_after=min(wait, 60))
        if status in _NO_LOGIN:
            why = "the login in" if self._login else "there is no login for it in"
            why = f"{why} docker's config file {self._config} (MOTHBALL_DOCKER_CONFIG)"
            why += " is not accepted or does not suffice" if self._login else ""
            raise RegistryDenied(registry=self.registry, reason=f"it answers {said} for {self.repository}: {why}")
        raise OperationFailed(reason=f"registry {self.registry} answers {said} for {self.repository}")

    def unavailable(self, error: BaseException) -> RegistryUnavailable:
        """The error for a connection that failed; its text is ours, for the exception's own may hold a URL."""
        return RegistryUnavailable(registry=self.registry, reason=_why(error))

    def patiently(self, call: Callable[[], T]) -> T:
        """`call()`, again after a pause while the registry is in trouble, `TRIES` times in all."""
        for number in range(TRIES):
            try:
                return call()
            except RegistryUnavailable as error:
                if number + 1 == TRIES:
                    raise
                self.pause(number, error)
        raise AssertionError("unreachable")  # pragma: no cover

    def pause(self, number: int, error: RegistryUnavailable) -> None:
        """Wait after failure `number` (from 0), as long as the registry asks for if it does."""
        until = time.monotonic() + max(
            float(error.fields.get("retry_after") or 0), min(PAUSE_SECONDS * 2**number, PAUSE_MAX_SECONDS)
        )
        while (left := until - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(left, PAUSE_SECONDS))

    # -- manifests and blobs -------------------------------------------------------------------------------------------

    def blob_size(self, digest: str) -> int | None:
        """Bytes of a blob that the repository has, None when it has not; `OperationFailed` when it does not tell."""
        response = self.request("HEAD", self.url(f"blobs/{digest}"), expected={200, 404})
        if response.status_code != requests.codes.ok:
            return None
        told = whole(response.headers.get("Content-Length", ""))
        if told is None:
            raise OperationFailed(reason=f"registry {self.registry} does not tell the size of blob {digest}")
        return told

    def has_blob(self, digest: str, size: int) -> bool:
        """True when the repository has the blob; `Corrupt` when it says that the blob has another size."""
        found = self.blob_size(digest)
        if found is not None and found != size:
            raise Corrupt(what=f"blob {digest} in registry {self.registry}", reason=f"it has {found} bytes there, not {size}")
        return found is not None

    def get_manifest(self, target: str, accept: str) -> tuple[bytes, str]:
        """The manifest of a tag or digest as bytes, and its media type; `NotFound`."""
        response = self.request(
            "GET", self.url(f"manifests/{target}"), headers={"Accept": accept}, expected={200, 404}, stream=True
        )
        with response:
            if response.status_code != requests.codes.ok:
                raise NotFound(f"registry {self.registry} has no image {self.reference}", what="image", id=str(self.reference))
            data = bytearray()
            for piece in self.pieces(response, ANSWER_LIMIT):
                data += piece
                if len(data) > MANIFEST_LIMIT:
                    raise Corrupt(what=f"the manifest of {self.reference}", reason=f"it has more than {MANIFEST_LIMIT:,} bytes")
            return bytes(data), response.headers.get("Content-Type", "").partition(";")[0].strip()

    def pieces(self, response: requests.Response, size: int = 0) -> Iterator[bytes]:
        """The body of a streamed answer in pieces of at most `size` bytes, as it came over the wire: nothing is decoded, for a
        kilobyte may decode to a gigabyte. A connection that breaks is `RegistryUnavailable`."""
        try:
            yield from response.raw.stream(size or PIECE, decode_content=False)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self.unavailable(error) from None

    def _codes(self, response: requests.Response) -> str:
        """The registry's own error codes; never its text, which may repeat what was sent."""
        try:
            errors = read_json(self._short(response), dict, "answer")["errors"]
            codes = [str(item["code"]) for item in errors[:3]]
        except (Corrupt, KeyError, TypeError, RegistryUnavailable):
            return ""
        shown = ", ".join(code for code in codes if _CODE.match(code))
        return f" ({shown})" if shown else ""


def whole(text: str) -> int | None:
    """The number in a header, None when it holds none or one that no file could have."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _why(error: BaseException) -> str:
    seen = list(_chain(error))
    if any(isinstance(item, Stalled) for item in seen):
        return next(item.strerror or "" for item in seen if isinstance(item, Stalled))
    if isinstance(error, requests.exceptions.SSLError):
        return "no TLS that can be trusted; MOTHBALL_INSECURE_REGISTRIES names registries that have plain HTTP"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if any(isinstance(item, (TimeoutError, urllib3.exceptions.ReadTimeoutError)) for item in seen):
        return f"no answer within {READ_SECONDS:g} s"
    known = (item.strerror for item in seen if isinstance(item, OSError) and not isinstance(item, requests.RequestException))
    return next((text for text in known if text), "the connection broke")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it wraps, in which each library has its own way."""
    for _ in range(10):
        if error is None:
            return
        yield error
        inner = [getattr(error, "reason", None), *error.args, error.__cause__]
        error = next((item for item in inner if isinstance(item, BaseException)), None)
