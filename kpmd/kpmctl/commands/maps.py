"""Commands about maps and what is in them."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import click

from kpmd.kpmctl.output import Column, Settings, Table, clean, write_table
from kpmd.kpmctl.parameters import hex_bytes, id_of
from kpmd.kpmctl.stopping import Stop, Stopped

if TYPE_CHECKING:
    from kpmd.client import answers


@click.command()
@click.pass_obj
def maps(settings: Settings) -> None:
    """List the maps of your programs."""
    with settings.client() as client:
        settings.write_list(client.maps(), map_table(), map_cells)


def map_table() -> Table:
    """A table of maps, without rows."""
    return Table(
        [
            Column("MAP"),
            Column("KERNEL ID", right=True),
            Column("NAME"),
            Column("TYPE"),
            Column("KEY", right=True),
            Column("VALUE", right=True),
            Column("ENTRIES", right=True),
            Column("PROGRAMS"),
        ]
    )


def map_cells(map_: answers.Map) -> list[object]:
    """A map as a row."""
    return [
        map_["id"],
        map_["kernel_id"],
        map_["name"],
        map_["type"],
        map_["key_size"],
        map_["value_size"],
        map_["max_entries"],
        ",".join(map_["programs"]),
    ]


@click.command()
@click.argument("map_id", type=id_of("map"))
@click.option(
    "--key", type=hex_bytes, metavar="HEX", help="Only the entry with this key, its bytes in hex."
)
@click.option("--hex", "as_hex", is_flag=True, help="Show bytes, also where their type is known.")
@click.pass_obj
def entries(settings: Settings, map_id: str, key: bytes | None, as_hex: bool) -> None:
    """Show the entries of a map.

    Keys and values are shown as the object's BTF describes them, else in hex, byte by byte as they
    lie in memory; per-CPU maps have one value for each CPU.
    """
    with settings.client() as client:
        if key is not None and settings.json:
            settings.write_json(client.entry(map_id, key))
            return
        found = client.entries(map_id) if key is None else iter([client.entry(map_id, key)])
        table = Table([Column("KEY"), Column("VALUE")])
        settings.write_list(found, table, lambda each: _entry_cells(each, as_hex))


def _entry_cells(entry: answers.Entry, as_hex: bool) -> list[object]:
    value = entry["value"]
    decoded = {} if as_hex else entry.get("decoded", {})
    return [
        _compact(decoded["key"]) if "key" in decoded else entry["key"],
        _compact(decoded["value"])
        if "value" in decoded
        else (value if isinstance(value, str) else " ".join(value)),
    ]


@click.command()
@click.argument("map_id", type=id_of("map"))
@click.argument("key")
@click.option("--put", "value", metavar="VALUE", help="Write this value.")
@click.option(
    "--mode",
    type=click.Choice(["any", "create", "replace"]),
    default="any",
    show_default=True,
    help="With --put: whether the entry may, must not, or must be there already.",
)
@click.option("--delete", is_flag=True, help="Delete the entry.")
@click.pass_obj
def entry(
    settings: Settings,
    map_id: str,
    key: str,
    value: str | None,
    mode: answers.Mode,
    delete: bool,
) -> None:
    """Show, write or delete one entry of a map.

    KEY and VALUE are bytes in hex or, behind json:, JSON that the daemon encodes as the object's
    BTF says: json:42, 'json:{"pid": 1}'.
    """
    if delete and value is not None:
        raise click.UsageError("give either --put or --delete")
    with settings.client() as client:
        if delete:
            client.delete_entry(map_id, key)
        elif value is not None:
            client.put_entry(map_id, key, given_value(value), mode)
        elif settings.json:
            settings.write_json(client.entry(map_id, key))
        else:
            found = client.entry(map_id, key)
            table = Table([Column("KEY"), Column("VALUE")])
            table.add(*_entry_cells(found, False))
            write_table(table)


def given_value(text: str) -> Any:
    """A value on the command line: bytes in hex, or JSON behind ``json:``."""
    if not text.startswith("json:"):
        return hex_bytes(text)
    try:
        return json.loads(text.removeprefix("json:"))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no JSON behind json: ({error})") from None


@click.command("globals")
@click.argument("program_id", type=id_of("prg"))
@click.argument("name", required=False)
@click.option(
    "--set", "value", metavar="VALUE", help="Write the variable; as the VALUE of `kpmctl entry`."
)
@click.pass_obj
def globals_(settings: Settings, program_id: str, name: str | None, value: str | None) -> None:
    """Show the global variables of a program, or one, or write one while the program runs."""
    if value is not None and name is None:
        raise click.UsageError("--set takes the NAME of a variable")
    with settings.client() as client:
        if name is not None and value is not None:
            client.set_global(program_id, name, given_value(value))
            return
        if name is not None and settings.json:
            settings.write_json(client.get_global(program_id, name))
            return
        found = (
            client.globals(program_id)
            if name is None
            else iter([client.get_global(program_id, name)])
        )
        table = Table([Column(title) for title in ("NAME", "SECTION", "TYPE", "VALUE", "WRITABLE")])
        settings.write_list(found, table, _global_cells)


def _global_cells(each: answers.Global) -> list[object]:
    shown = _compact(each["decoded"]) if "decoded" in each else each["value"]
    writable = "yes" if each["writable"] else "no"
    return [each["name"], each["section"], each["type"], shown, writable]


def _compact(value: object) -> str:
    """A decoded value in one line; what is no object or list as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@click.command()
@click.argument("map_id", type=id_of("map"))
@click.option(
    "--type",
    "type_",
    metavar="STRUCT",
    help="The struct in the object's BTF that each record is.  [default: the one that fits]",
)
@click.pass_obj
def records(settings: Settings, map_id: str, type_: str | None) -> None:
    """Show the records of a ring buffer or perf event array as they come, until Ctrl-C.

    A line each: the members of its struct, or its bytes in hex where the struct is not known. Where
    records are lost, a line on standard error says how many and why. Records that were shown are
    gone for who reads the map later.

    Ends when the map does; with status 3 where the daemon cut it off.
    """
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        last.enter_context(contextlib.suppress(Stopped))
        client = last.enter_context(settings.client())
        with stop.breakable():
            found = client.records(map_id, type_)
        while True:
            with stop.breakable():
                record = next(found, None)
            if record is None:
                return
            if settings.json:
                settings.write_json(record)
            elif "lost" in record:
                click.echo(f"{record['lost']} records lost: {record.get('reason')}", err=True)
            else:
                click.echo(_record_line(record))


def _record_line(record: answers.Record) -> str:
    decoded = record.get("decoded")
    if decoded is None:
        return record.get("data", "")
    if not isinstance(decoded, dict):
        return clean(_compact(decoded))
    return clean("  ".join(f"{name}={_compact(value)}" for name, value in decoded.items()))
