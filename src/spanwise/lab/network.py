"""Namespaces, cables and traffic shaping of a lab.

A device hangs on its site's bridge by one veth cable (``eth0``) and on the hub by another (``ctl0``, out of
band, not shaped). What a device sends to its gateway, the router hands to ``tun0``, where the relay takes it.
"""

from __future__ import annotations

from spanwise.core.cluster import Device
from spanwise.lab.commands import batch, call, write_sysctls
from spanwise.lab.layout import Layout

_TABLE = 100
# A file's bandwidth is that of TCP's payload: 1448 of 1514 bytes of a frame, with time stamps.
_FRAME_PER_PAYLOAD = 1514 / 1448
_QUEUE_S = 0.05
_LEAST_QUEUE_BYTES = 256 * 1024
_UNLIMITED = "40gbit"
_QUIET = {
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/default/accept_redirects": "0",
}
# Most devices run cubic. A kernel may allow it to its first namespace only; reno is always allowed, and much
# the same on paths this short. A connection may go on at the speed that it had before a pause, and nothing is
# remembered of earlier connections: runs of one lab do not depend on each other.
_TCP = {
    "net/ipv4/tcp_congestion_control": "cubic reno",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
}


def build(layout: Layout) -> None:
    """Makes all namespaces, cables, bridges, addresses, routes and shaping."""
    for namespace in layout.namespaces:
        call("ip", "netns", "add", namespace)
    _build_hub(layout)
    for site in layout.sites:
        _build_site(layout, site)
    for device in layout.cluster.devices:
        _build_device(layout, device)


def _build_hub(layout: Layout) -> None:
    write_sysctls(layout.hub, _QUIET)
    lines = ["link set lo up", "link add br0 type bridge", f"addr add {layout.hub_address}/16 dev br0"]
    batch("ip", layout.hub, [*lines, "link set br0 up"])


def _build_site(layout: Layout, site: str) -> None:
    namespace = layout.site_namespace(site)
    write_sysctls(namespace, _QUIET | {"net/ipv4/ip_forward": "1"})
    lines = [
        "link set lo up",
        "link add br0 type bridge",
        f"addr add {layout.gateway(site)}/24 dev br0",
        "link set br0 up",
        "tuntap add mode tun name tun0 vnet_hdr",
        "link set tun0 txqueuelen 1000 up",
        f"route add default dev tun0 table {_TABLE}",
        f"rule add iif br0 lookup {_TABLE}",
    ]
    batch("ip", namespace, lines)


def _build_device(layout: Layout, device: Device) -> None:
    mine, router = layout.device_namespace(device.id), layout.site_namespace(device.site)
    write_sysctls(mine, _QUIET | _TCP)
    lines = [
        "link set lo up",
        f"link add eth0 type veth peer name {device.id} netns {router}",
        f"link add ctl0 type veth peer name {device.id} netns {layout.hub}",
        f"addr add {layout.address(device.id)}/24 dev eth0",
        f"addr add {layout.control_address(device.id)}/16 dev ctl0",
        "link set eth0 up",
        "link set ctl0 up",
        f"route add default via {layout.gateway(device.site)} dev eth0",
    ]
    lines += [_detour(layout, device, mate) for mate in layout.detours(device.id)]
    batch("ip", mine, lines)
    for namespace in (router, layout.hub):
        batch("ip", namespace, [f"link set dev {device.id} master br0", f"link set dev {device.id} up"])
    shape(layout, device)


def _detour(layout: Layout, device: Device, mate: str) -> str:
    return f"route replace {layout.address(mate)}/32 via {layout.gateway(device.site)} dev eth0"


def shape(layout: Layout, device: Device) -> None:
    """Limits a device's cable: what it sends at its own end, what it gets at the router's."""
    network, rate = layout.network(device.site), layout.switch_rate(device)
    mine, router = layout.device_namespace(device.id), layout.site_namespace(device.site)
    for namespace, interface in ((mine, "eth0"), (router, device.id)):  # an earlier shape goes as a whole
        call("tc", "-n", namespace, "qdisc", "del", "dev", interface, "root", check=False)
    batch("tc", mine, _shaping("eth0", f"dst {network}", rate, device.up_bytes_per_s))
    batch("tc", router, _shaping(device.id, f"src {network}", rate, device.down_bytes_per_s))


def _shaping(interface: str, neighbours: str, switch: float | None, port: float | None) -> list[str]:
    """Class 1:1 is the port, 1:10 what goes to or comes from the site's own devices, 1:20 the rest."""
    port_rate = _UNLIMITED if port is None else _tc_rate(port)
    inner = port_rate if switch is None else _tc_rate(switch if port is None else min(switch, port))
    widest = max(port or 0.0, switch or 0.0)
    queue = max(int(widest * _QUEUE_S), _LEAST_QUEUE_BYTES)
    burst = "burst 64k cburst 64k quantum 60000"
    parent = f"dev {interface} parent"
    return [
        f"qdisc add dev {interface} root handle 1: htb default 20",
        f"class add {parent} 1: classid 1:1 htb rate {port_rate} {burst}",
        f"class add {parent} 1:1 classid 1:10 htb rate {inner} ceil {inner} {burst}",
        f"class add {parent} 1:1 classid 1:20 htb rate {port_rate} ceil {port_rate} {burst}",
        f"qdisc add {parent} 1:10 handle 10: bfifo limit {queue}",
        f"qdisc add {parent} 1:20 handle 20: bfifo limit {max(queue, 4 * _LEAST_QUEUE_BYTES)}",
        f"filter add {parent} 1: protocol ip prio 1 handle 800::800 u32 match ip {neighbours} flowid 1:10",
    ]


def _tc_rate(bytes_per_s: float) -> str:
    return f"{max(round(bytes_per_s * 8 * _FRAME_PER_PAYLOAD), 8)}bit"


def reroute(old: Layout, new: Layout) -> None:
    """Brings cables and routes from one layout to another that differs in its links only."""
    for device in new.cluster.devices:
        before, after = set(old.detours(device.id)), set(new.detours(device.id))
        lines = [_detour(new, device, mate) for mate in sorted(after - before)]
        lines += [f"route del {new.address(mate)}/32" for mate in sorted(before - after)]
        batch("ip", new.device_namespace(device.id), lines)
        if old.switch_rate(device) != new.switch_rate(device):
            shape(new, device)


def sent_bytes(layout: Layout, device: str) -> int:
    """Bytes that a device has sent on the data network, with headers, since the lab is up."""
    text = call("ip", "-n", layout.device_namespace(device), "-s", "-o", "link", "show", "dev", "eth0")
    return int(text.partition("TX:")[2].split("\\")[1].split()[0])
