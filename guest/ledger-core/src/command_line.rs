//! `ip=10.77.0.10/24 port=7000 [gw=10.77.0.1]`, in any order, unknown words ignored.

use core::net::Ipv4Addr;

/// What the command line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Our address.
    pub address: Ipv4Addr,
    /// Length of the network prefix.
    pub prefix: u8,
    /// TCP port of the service.
    pub port: u16,
    /// Where everything outside the prefix goes.
    pub gateway: Option<Ipv4Addr>,
}

/// Reads a command line; the error names the word that is missing or makes no sense.
pub fn parse(line: &str) -> Result<Settings, &'static str> {
    let mut address = None;
    let mut port = None;
    let mut gateway = None;
    for word in line.split_ascii_whitespace() {
        if let Some(value) = word.strip_prefix("ip=") {
            let (ip, prefix) = value.split_once('/').ok_or("ip= wants ADDRESS/PREFIX")?;
            let ip: Ipv4Addr = ip.parse().map_err(|_| "ip= wants ADDRESS/PREFIX")?;
            let prefix: u8 = prefix.parse().map_err(|_| "ip= wants ADDRESS/PREFIX")?;
            if prefix > 32 {
                return Err("ip= wants a prefix of at most 32");
            }
            address = Some((ip, prefix));
        } else if let Some(value) = word.strip_prefix("port=") {
            port = Some(value.parse().map_err(|_| "port= wants a number from 1 to 65535")?);
        } else if let Some(value) = word.strip_prefix("gw=") {
            gateway = Some(value.parse().map_err(|_| "gw= wants an IPv4 address")?);
        }
    }
    let (address, prefix) = address.ok_or("ip= is missing")?;
    let port = port.ok_or("port= is missing")?;
    if port == 0 {
        return Err("port= wants a number from 1 to 65535");
    }
    Ok(Settings {
        address,
        prefix,
        port,
        gateway,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_line() {
        let settings = parse("quiet ip=10.77.0.10/24 port=7000 gw=10.77.0.1").unwrap();
        assert_eq!(settings.address, Ipv4Addr::new(10, 77, 0, 10));
        assert_eq!((settings.prefix, settings.port), (24, 7000));
        assert_eq!(settings.gateway, Some(Ipv4Addr::new(10, 77, 0, 1)));
        assert_eq!(parse("port=1 ip=1.2.3.4/8").unwrap().gateway, None);
    }

    #[test]
    fn errors_name_the_word() {
        for (line, word) in [
            ("", "ip="),
            ("ip=10.0.0.1/24", "port="),
            ("ip=10.0.0.1 port=1", "ip="),
            ("ip=10.0.0.1/33 port=1", "ip="),
            ("ip=10.0.0.1/24 port=0", "port="),
            ("ip=10.0.0.1/24 port=70000", "port="),
            ("ip=10.0.0.1/24 port=1 gw=x", "gw="),
        ] {
            assert!(parse(line).unwrap_err().starts_with(word), "{line}");
        }
    }
}
