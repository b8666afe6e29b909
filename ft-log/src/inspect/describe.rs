//! An entry in words.

use ft_client::handshake::hex;
use ft_protocol::{
    DeviceId, Stop,
    entry::{Body, Entry},
};
use serde_json::{Map, Value, json};

use crate::control::configure;

/// Bytes of a payload that a table shows.
const SHOWN_BYTES: usize = 16;

/// Name of a device, as `--device` takes it.
pub(super) fn device(device: DeviceId) -> String {
    match device {
        DeviceId::SHIM => "shim".into(),
        DeviceId(number) => number.to_string(),
    }
}

/// Place of a stop: exits, and the offset where there is one. `ft-vcpu-shim replay --to` takes it.
pub(super) fn position(stop: &Stop) -> String {
    match stop.position.offset {
        0 => stop.position.exits.to_string(),
        offset => format!("{}+{offset}", stop.position.exits),
    }
}

/// What an entry says beyond its header and its stop.
pub(super) fn fields(body: &Body<'_>) -> Map<String, Value> {
    let fields = match body {
        Body::Boot {
            fingerprint,
            wall_ns,
            devices,
        } => json!({ "fingerprint": hex(fingerprint), "wall_ns": wall_ns, "devices_bytes": devices.len() }),
        Body::Input { sequence, payload } => json!({ "sequence": sequence, "payload_bytes": payload.len() }),
        Body::Deliver { through, .. } => json!({ "through": through }),
        Body::Time { now_ns, .. } => json!({ "now_ns": now_ns }),
        Body::Console { bytes, .. } => json!({ "console_bytes": bytes }),
        Body::PowerOff { reset, .. } => json!({ "reset": reset }),
        Body::Pages { payload } | Body::State { payload, .. } => json!({ "payload_bytes": payload.len() }),
        Body::Write { sector, payload } => json!({ "sector": sector, "payload_bytes": payload.len() }),
        Body::Zeroes { sector, sectors, unmap } => json!({ "sector": sector, "sectors": sectors, "unmap": unmap }),
        Body::Compare { sector, sectors } => json!({ "sector": sector, "sectors": sectors }),
        Body::Synced { instance } => json!({ "instance": format!("{instance:016x}") }),
        Body::Configuration(timing) => configure::show(timing),
        Body::Kick(_) | Body::Sync(_) | Body::Flush | Body::Transferred => json!({}),
    };
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn payload<'a>(body: &Body<'a>) -> Option<&'a [u8]> {
    match *body {
        Body::Input { payload, .. }
        | Body::Pages { payload }
        | Body::State { payload, .. }
        | Body::Write { payload, .. } => Some(payload),
        Body::Boot { devices, .. } => Some(devices),
        _ => None,
    }
}

/// The whole entry.
pub(crate) fn json(vm: &str, entry: &Entry<'_>, frame_bytes: usize, with_payload: bool) -> Value {
    let mut fields = fields(&entry.body);
    let mut whole = Map::from_iter([
        ("vm".into(), json!(vm)),
        ("generation".into(), json!(entry.generation.0)),
        ("lsn".into(), json!(entry.lsn.0)),
        ("kind".into(), json!(entry.body.name())),
        ("device".into(), json!(device(entry.device))),
        ("queue".into(), json!(entry.queue)),
        ("frame_bytes".into(), json!(frame_bytes)),
    ]);
    if let Some(stop) = entry.body.stop() {
        let at = stop.position;
        whole.extend([
            ("exits".into(), json!(at.exits)),
            ("offset".into(), json!(at.offset)),
            ("rip".into(), json!(format!("{:#x}", at.rip))),
            ("rcx".into(), json!(format!("{:#x}", at.rcx))),
            ("digest".into(), json!(format!("{:016x}", stop.digest))),
        ]);
    }
    whole.append(&mut fields);
    if let Some(bytes) = payload(&entry.body).filter(|_| with_payload) {
        whole.insert("payload".into(), json!(hex(bytes)));
    }
    Value::Object(whole)
}

/// The last column of the table.
pub(super) fn line(body: &Body<'_>, with_payload: bool) -> String {
    let mut parts = Vec::new();
    if let Some(stop) = body.stop() {
        parts.push(format!("rip={:#x} digest={:016x}", stop.position.rip, stop.digest));
    }
    for (key, value) in fields(body) {
        let text = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        parts.push(format!("{key}={text}"));
    }
    if let Some(bytes) = payload(body).filter(|bytes| !bytes.is_empty()) {
        let shown = if with_payload {
            bytes.len()
        } else {
            bytes.len().min(SHOWN_BYTES)
        };
        let more = if shown < bytes.len() { "..." } else { "" };
        parts.push(format!("payload={}{more}", hex(&bytes[..shown])));
    }
    parts.join(" ")
}
