//! How an operator names an arbiter.

use std::{convert::Infallible, fmt, path::PathBuf, str::FromStr};

use thiserror::Error;

const SCHEME: &str = "etcd://";
/// Where claims are in etcd unless the operator says otherwise.
const DEFAULT_PREFIX: &str = "/ft-log";
/// Members of a cluster that may be named.
const ENDPOINTS_MAX: usize = 16;

/// `DIR`, or `etcd://HOST:PORT[,HOST:PORT]...[/PREFIX]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArbiterAddress {
    /// A directory on storage that both hosts share.
    Directory(PathBuf),
    /// An etcd cluster.
    Etcd {
        /// `HOST:PORT` of its members.
        endpoints: Vec<String>,
        /// What the names of claims begin with.
        prefix: String,
    },
}

/// Why an arbiter's name is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// No member, or too many.
    #[error("etcd://HOST:PORT[,HOST:PORT]...[/PREFIX] names {0} members: 1 to {ENDPOINTS_MAX} are possible")]
    Members(usize),
    /// A member that is not a host and a port.
    #[error("'{0}' is not HOST:PORT: an etcd member is named by its client address, as in 10.0.0.1:2379")]
    Member(String),
}

impl FromStr for ArbiterAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some(rest) = text.strip_prefix(SCHEME) else {
            let Ok(path) = PathBuf::from_str(text) as Result<_, Infallible>;
            return Ok(Self::Directory(path));
        };
        let (members, prefix) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, DEFAULT_PREFIX),
        };
        let endpoints: Vec<String> = members
            .split(',')
            .filter(|member| !member.is_empty())
            .map(Into::into)
            .collect();
        if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
            return Err(AddressError::Members(endpoints.len()));
        }
        let is_member = |member: &str| {
            let (host, port) = member.rsplit_once(':')?;
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_[]:".contains(&byte);
            (!host.is_empty() && host.bytes().all(plain) && port.parse::<u16>().is_ok_and(|port| port != 0))
                .then_some(())
        };
        if let Some(wrong) = endpoints.iter().find(|member| is_member(member).is_none()) {
            return Err(AddressError::Member(wrong.clone()));
        }
        let prefix = prefix.trim_end_matches('/').to_owned();
        Ok(Self::Etcd { endpoints, prefix })
    }
}

impl fmt::Display for ArbiterAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Etcd { endpoints, prefix } => write!(f, "{SCHEME}{}{prefix}", endpoints.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for text in [
            "/shared/arbiter",
            "relative",
            "etcd://a:1/ft-log",
            "etcd://10.0.0.1:2379,[::1]:2379/vms/x",
        ] {
            let address: ArbiterAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        let default: ArbiterAddress = "etcd://a:1,b:2".parse().unwrap();
        let endpoints = vec!["a:1".to_owned(), "b:2".to_owned()];
        let prefix = DEFAULT_PREFIX.into();
        assert_eq!(default, ArbiterAddress::Etcd { endpoints, prefix });
    }

    #[test]
    fn what_is_no_cluster_is_refused() {
        for text in [
            "etcd://",
            "etcd:///prefix",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:b",
            "etcd://:1",
            "etcd://a@b:1",
        ] {
            assert!(text.parse::<ArbiterAddress>().is_err(), "{text}");
        }
        let many = format!("etcd://{}", vec!["a:1"; ENDPOINTS_MAX + 1].join(","));
        assert_eq!(
            many.parse::<ArbiterAddress>(),
            Err(AddressError::Members(ENDPOINTS_MAX + 1))
        );
    }
}
