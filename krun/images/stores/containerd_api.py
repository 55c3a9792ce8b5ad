"""The few messages of containerd's gRPC API that krun needs; sole importer of grpc and protobuf.

No Python package of containerd's API is kept up, and the services used here have been stable
since containerd 1.0 (github.com/containerd/containerd: api/services/{images,containers,content}).
The messages are declared as a table and built at run time, so no generated code is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    empty_pb2,
    field_mask_pb2,
    message_factory,
    timestamp_pb2,
)

# message: fields as (name, number, type); a trailing * is repeated, map is map<string,string>.
_MESSAGES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "Descriptor": (("media_type", 1, "string"), ("digest", 2, "string"), ("size", 3, "int64")),
    "Image": (
        ("name", 1, "string"),
        ("labels", 2, "map"),
        ("target", 3, "Descriptor"),
        ("created_at", 7, "google.protobuf.Timestamp"),
        ("updated_at", 8, "google.protobuf.Timestamp"),
    ),
    "ListImagesRequest": (("filters", 1, "string*"),),
    "ListImagesResponse": (("images", 1, "Image*"),),
    "CreateImageRequest": (("image", 1, "Image"),),
    "CreateImageResponse": (("image", 1, "Image"),),
    "UpdateImageRequest": (("image", 1, "Image"), ("update_mask", 2, "google.protobuf.FieldMask")),
    "UpdateImageResponse": (("image", 1, "Image"),),
    "DeleteImageRequest": (("name", 1, "string"), ("sync", 2, "bool")),
    "Container": (("id", 1, "string"), ("labels", 2, "map"), ("image", 3, "string")),
    "ListContainersRequest": (("filters", 1, "string*"),),
    "ListContainersResponse": (("containers", 1, "Container*"),),
    "Info": (("digest", 1, "string"), ("size", 2, "int64"), ("labels", 5, "map")),
    "ListContentRequest": (("filters", 1, "string*"),),
    "ListContentResponse": (("info", 1, "Info*"),),
    "Plugin": (("type", 1, "string"), ("id", 2, "string"), ("exports", 5, "map")),
    "PluginsRequest": (("filters", 1, "string*"),),
    "PluginsResponse": (("plugins", 1, "Plugin*"),),
}
_PACKAGE = "krun.containerd"
_SERVICES = "/containerd.services"
_TYPES = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
}


def _add_field(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_OPTIONAL
    if kind.endswith("*") or kind == "map":
        field.label = field.LABEL_REPEATED
        kind = kind.rstrip("*")
    if kind == "map":
        # The compiler's own form of map<string, string>: a nested entry message.
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", 1, "string")
        _add_field(entry, "value", 2, "string")
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"
    elif kind in _TYPES:
        field.type = _TYPES[kind]
    else:
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{kind}" if "." in kind else f".{_PACKAGE}.{kind}"


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="krun/containerd.proto", package=_PACKAGE, syntax="proto3"
    )
    for known in (empty_pb2, field_mask_pb2, timestamp_pb2):
        file.dependency.append(known.DESCRIPTOR.name)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, *field)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _build()


class Refused(Exception):
    """containerd answered with an error; `code` is gRPC's name for it, such as NOT_FOUND."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Api:
    """One connection to containerd, for one of its namespaces."""

    def __init__(self, address: str, namespace: str, timeout: float) -> None:
        limit = [("grpc.max_receive_message_length", 256 << 20)]
        self._channel = grpc.insecure_channel(f"unix:{address}", limit)
        self._metadata = (("containerd-namespace", namespace),)
        self._timeout = timeout

    def _call(self, method: str, request: str, response: str, **fields: Any) -> Any:
        answer = _CLASSES[response] if response else empty_pb2.Empty
        call = self._channel.unary_unary(
            f"{_SERVICES}.{method}",
            request_serializer=_CLASSES[request].SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return call(_CLASSES[request](**fields), metadata=self._metadata, timeout=self._timeout)
        except grpc.RpcError as error:
            raise Refused(error.code().name, str(error.details())) from error

    def images(self) -> list[Any]:
        """Return the image records: name, labels, target, created_at."""
        return list(
            self._call("images.v1.Images/List", "ListImagesRequest", "ListImagesResponse").images
        )

    def create_image(self, name: str, like: Any) -> None:
        """Give another image's target one more name."""
        image = _CLASSES["Image"](name=name, target=like.target, labels=dict(like.labels))
        self._call(
            "images.v1.Images/Create", "CreateImageRequest", "CreateImageResponse", image=image
        )

    def set_label(self, name: str, label: str, value: str) -> None:
        """Set an image's label; an empty value removes it."""
        image = _CLASSES["Image"](name=name, labels={label: value} if value else {})
        self._call(
            "images.v1.Images/Update",
            "UpdateImageRequest",
            "UpdateImageResponse",
            image=image,
            update_mask=field_mask_pb2.FieldMask(paths=[f"labels.{label}"]),
        )

    def delete_image(self, name: str) -> None:
        """Delete an image record and wait for the garbage collection."""
        self._call("images.v1.Images/Delete", "DeleteImageRequest", "", name=name, sync=True)

    def containers(self) -> list[Any]:
        """Return the containers: id, labels, image."""
        return list(
            self._call(
                "containers.v1.Containers/List", "ListContainersRequest", "ListContainersResponse"
            ).containers
        )

    def content(self) -> Iterator[Any]:
        """Yield the blobs of the content store: digest, size, labels."""
        call = self._channel.unary_stream(
            f"{_SERVICES}.content.v1.Content/List",
            request_serializer=_CLASSES["ListContentRequest"].SerializeToString,
            response_deserializer=_CLASSES["ListContentResponse"].FromString,
        )
        try:
            for part in call(
                _CLASSES["ListContentRequest"](), metadata=self._metadata, timeout=self._timeout
            ):
                yield from part.info
        except grpc.RpcError as error:
            raise Refused(error.code().name, str(error.details())) from error

    def plugins(self) -> list[Any]:
        """Return the daemon's plugins: type, id, exports (which hold their directories)."""
        return list(
            self._call(
                "introspection.v1.Introspection/Plugins", "PluginsRequest", "PluginsResponse"
            ).plugins
        )
