//! Certificates of the two hosts, for the rows with TLS: of `ft-log` and of the plain stream that it is compared with.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

/// Hosts by side, primary first.
const NAMES: [&str; 2] = ["a", "b"];

/// A certificate and a key for each side.
pub(super) struct Identities {
    files: PathBuf,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identities {
    /// Makes them, with files in `directory`.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub(super) fn make(directory: &Path) -> io::Result<Self> {
        let mut last = None;
        for name in NAMES {
            let made = rcgen::generate_simple_self_signed([name.to_owned()]).map_err(io::Error::other)?;
            fs::write(directory.join(format!("{name}.crt")), made.cert.pem())?;
            fs::write(directory.join(format!("{name}.key")), made.signing_key.serialize_pem())?;
            last = Some(made);
        }
        let made = last.expect("there are two names");
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).map_err(io::Error::other)?;
        let client = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .map_err(io::Error::other)?;
        Ok(Self {
            files: directory.to_owned(),
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// The options of `ft-log` on that side.
    pub(super) fn options(&self, side: usize) -> String {
        let file = |side: usize, what: &str| self.files.join(format!("{}.{what}", NAMES[side])).display().to_string();
        format!(
            "tls-cert = '{}'\ntls-key = '{}'\ntls-peer = '{}'",
            file(side, "crt"),
            file(side, "key"),
            file(1 - side, "crt")
        )
    }

    /// The connecting end of a plain TLS stream.
    ///
    /// # Errors
    /// A name or a configuration that rustls refuses.
    pub(super) fn connected(&self, stream: TcpStream) -> io::Result<impl Read + Write + Send + 'static> {
        let name = ServerName::try_from(NAMES[1]).map_err(io::Error::other)?;
        let session = ClientConnection::new(Arc::clone(&self.client), name).map_err(io::Error::other)?;
        Ok(StreamOwned::new(session, stream))
    }

    /// The accepting end.
    ///
    /// # Errors
    /// A configuration that rustls refuses.
    pub(super) fn accepted(&self, stream: TcpStream) -> io::Result<impl Read + Write + Send + 'static> {
        let session = ServerConnection::new(Arc::clone(&self.server)).map_err(io::Error::other)?;
        Ok(StreamOwned::new(session, stream))
    }
}
