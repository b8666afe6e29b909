//! What a device looks like to its driver, in a form that travels in the log's power-on entry.

use serde_json::{Value, json};

/// Identity, features and configuration space of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// virtio device type.
    pub device_type: u32,
    /// Features offered to the driver.
    pub features: u64,
    /// Configuration space.
    pub config: Vec<u8>,
    /// Number of queues.
    pub queues: usize,
}

/// All devices as bytes, in their order.
#[must_use]
pub fn encode(devices: &[&Description]) -> Vec<u8> {
    let device = |device: &&Description| json!({"type": device.device_type, "features": device.features, "config": device.config, "queues": device.queues});
    Value::Array(devices.iter().map(device).collect())
        .to_string()
        .into_bytes()
}

/// The devices in the bytes of a power-on entry; `None` if they are not a description.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Vec<Description>> {
    let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok());
    let device = |value: &Value| {
        Some(Description {
            device_type: u32::try_from(value["type"].as_u64()?).ok()?,
            features: value["features"].as_u64()?,
            config: value["config"].as_array()?.iter().map(byte).collect::<Option<_>>()?,
            queues: usize::try_from(value["queues"].as_u64()?)
                .ok()
                .filter(|queues| *queues <= 16)?,
        })
    };
    serde_json::from_slice::<Value>(bytes)
        .ok()?
        .as_array()?
        .iter()
        .map(device)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_read_back_and_garbage_is_none() {
        let device = Description {
            device_type: 2,
            features: 1 << 32 | 5,
            config: vec![0, 255, 3],
            queues: 1,
        };
        assert_eq!(decode(&encode(&[&device])), Some(vec![device]));
        assert_eq!(decode(b"[{}]"), None);
        assert_eq!(decode(b"\xff"), None);
    }
}
