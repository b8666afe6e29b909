//! Mutual TLS 1.3 on the logging channel, without I/O: ciphertext in, plaintext out, and the other way round.
//!
//! ```text
//!  frames ──write──► Session ──output──► socket        a side proves that it has the key of its certificate,
//!  frames ◄──read─── Session ◄──input─── socket        and takes exactly the certificates it was given for its peer
//! ```
//! There is no authority between the two hosts of a VM: each is given the other's certificate, which makes the pair's identity. Heartbeats are
//! datagrams outside of the session: their authentication keys come from it, one for each direction.

use std::{
    fmt,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName,
    InvalidMessage, ServerConfig, ServerConnection, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{
        WebPkiSupportedAlgorithms,
        ring::{self, cipher_suite::TLS13_AES_128_GCM_SHA256},
        tls13::OkmBlock,
        verify_tls13_signature,
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    version::TLS13,
};
use thiserror::Error;

use crate::config::Side;

/// Bytes of a heartbeat's authentication tag.
pub const TAG_BYTES: usize = 16;
/// The handshake wants a name; who the peer is, its certificate says.
const SERVER_NAME: &str = "ft-log.invalid";
/// What both sides must mean by a session.
const PROTOCOL: &[u8] = b"ft-log/1";

/// Why the identities that were given cannot be used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// A file.
    #[error("{path}: cannot read {what}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// Key and certificate.
    #[error("{path}: {source} (--tls-key must be the key of --tls-cert)")]
    Pair {
        /// The certificate.
        path: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
}

/// Who this side is, and whom it takes for its peer.
#[derive(Clone)]
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity")
    }
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let failed = |reason: String| IdentityError::File {
        path: path.to_owned(),
        what,
        reason,
    };
    let found = CertificateDer::pem_file_iter(path).map_err(|error| failed(error.to_string()))?;
    let found: Vec<_> = found
        .collect::<Result<_, _>>()
        .map_err(|error| failed(error.to_string()))?;
    match found.is_empty() {
        true => Err(failed("there is no certificate in it (PEM)".into())),
        false => Ok(found),
    }
}

impl Identity {
    /// Reads this side's certificate and key, and the certificates of its peer.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn read(certificate: &Path, key: &Path, peer: &Path) -> Result<Self, IdentityError> {
        let own = certificates(certificate, "this host's certificate (--tls-cert)")?;
        let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| IdentityError::File {
            path: key.to_owned(),
            what: "this host's private key (--tls-key)",
            reason: error.to_string(),
        })?;
        let provider = Arc::new(ring::default_provider());
        let pinned = Arc::new(Pinned {
            certificates: certificates(peer, "the peer's certificate (--tls-peer)")?,
            algorithms: provider.signature_verification_algorithms,
        });
        let wrong = |source| IdentityError::Pair {
            path: certificate.to_owned(),
            source,
        };
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(wrong)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&pinned) as Arc<dyn ServerCertVerifier>)
            .with_client_auth_cert(own.clone(), secret.clone_key())
            .map_err(wrong)?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(wrong)?
            .with_client_cert_verifier(pinned)
            .with_single_cert(own, secret)
            .map_err(wrong)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        // Every connection proves anew who is there.
        client.resumption = rustls::client::Resumption::disabled();
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// A session of a new connection: the primary connected, the backup accepted.
    ///
    /// # Errors
    /// A configuration that rustls refuses.
    pub fn session(&self, side: Side) -> io::Result<Session> {
        let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
        let mut connection = match side {
            Side::Primary => ClientConnection::new(Arc::clone(&self.client), name).map(Connection::from),
            Side::Backup => ServerConnection::new(Arc::clone(&self.server)).map(Connection::from),
        }
        .map_err(io::Error::other)?;
        // What is written leaves at once; how much that is, the channel bounds.
        connection.set_buffer_limit(None);
        Ok(Session {
            connection,
            side,
            has_keys_to_give: true,
        })
    }
}

/// Takes exactly these certificates, from whoever proves to have the key.
#[derive(Debug)]
struct Pinned {
    certificates: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        match self
            .certificates
            .iter()
            .any(|pinned| pinned.as_ref() == certificate.as_ref())
        {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// One connection's session.
pub struct Session {
    connection: Connection,
    side: Side,
    has_keys_to_give: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let handshaking = self.connection.is_handshaking();
        f.debug_struct("Session").field("handshaking", &handshaking).finish()
    }
}

impl Session {
    /// Whether the two sides know each other: only then may frames leave.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.connection.is_handshaking()
    }

    /// Encrypts frames.
    ///
    /// # Errors
    /// A session that is over.
    pub fn write(&mut self, frames: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(frames)
    }

    /// Appends what is to be sent to `out`.
    ///
    /// # Errors
    /// None that a memory buffer could cause.
    pub fn output(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(out)?;
        }
        Ok(())
    }

    /// Takes what was received, and puts the frames in it to the start of `plain`; gives their length.
    ///
    /// # Errors
    /// What is wrong with the peer, as [`io::ErrorKind::InvalidData`]. An alert that tells it why is in [`Session::output`] then.
    ///
    /// # Panics
    /// If `plain` is shorter than `received` and one record more: the caller's bug.
    pub fn read(&mut self, mut received: &[u8], plain: &mut [u8]) -> io::Result<usize> {
        let mut length = 0;
        while !received.is_empty() {
            if self.connection.read_tls(&mut received)? == 0 {
                break;
            }
            let state = self.connection.process_new_packets().map_err(|error| refusal(&error))?;
            let bytes = state.plaintext_bytes_to_read();
            self.connection
                .reader()
                .read_exact(&mut plain[length..length + bytes])?;
            length += bytes;
        }
        Ok(length)
    }

    /// The keys that authenticate heartbeats, once, when the session is open.
    pub fn take_heartbeat_keys(&mut self) -> Option<HeartbeatKeys> {
        if !self.is_open() || !std::mem::take(&mut self.has_keys_to_give) {
            return None;
        }
        let key = |label: &[u8]| self.connection.export_keying_material([0; 32], label, None).ok();
        let (primary, backup) = (
            key(b"EXPORTER-ft-log-heartbeat-primary")?,
            key(b"EXPORTER-ft-log-heartbeat-backup")?,
        );
        Some(match self.side {
            Side::Primary => HeartbeatKeys {
                send: primary,
                receive: backup,
            },
            Side::Backup => HeartbeatKeys {
                send: backup,
                receive: primary,
            },
        })
    }
}

/// What went wrong, for the operator.
fn refusal(error: &rustls::Error) -> io::Error {
    let reason = match error {
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::MessageTooLarge) => {
            "the peer does not speak TLS: give both sides --tls-cert, --tls-key and --tls-peer".to_owned()
        }
        rustls::Error::InvalidCertificate(_) => "the peer's certificate is not the one in --tls-peer".to_owned(),
        rustls::Error::NoCertificatesPresented => "the peer has no certificate".to_owned(),
        rustls::Error::AlertReceived(alert) => {
            format!("the peer refused this side ({alert:?}): is --tls-cert what the peer has as --tls-peer?")
        }
        other => format!("TLS: {other}"),
    };
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Keys for datagrams, one for each direction, so that none can be sent back to its sender.
#[derive(Clone)]
pub struct HeartbeatKeys {
    send: [u8; 32],
    receive: [u8; 32],
}

impl fmt::Debug for HeartbeatKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HeartbeatKeys")
    }
}

/// HMAC-SHA-256, cut.
fn tag(key: &[u8; 32], message: &[u8]) -> [u8; TAG_BYTES] {
    let suite = TLS13_AES_128_GCM_SHA256.tls13().expect("this suite is one of TLS 1.3");
    let tag = suite.hkdf_provider.hmac_sign(&OkmBlock::new(key), message);
    let mut cut = [0; TAG_BYTES];
    cut.copy_from_slice(&tag.as_ref()[..TAG_BYTES]);
    cut
}

impl HeartbeatKeys {
    #[cfg(test)]
    pub(crate) fn of(send: [u8; 32], receive: [u8; 32]) -> Self {
        Self { send, receive }
    }

    /// Appends the tag to a datagram.
    pub fn seal(&self, datagram: &mut Vec<u8>) {
        let tag = tag(&self.send, datagram);
        datagram.extend_from_slice(&tag);
    }

    /// A datagram without its tag; `None` if the peer did not send it.
    #[must_use]
    pub fn open<'a>(&self, datagram: &'a [u8]) -> Option<&'a [u8]> {
        let (message, claimed) = datagram.split_last_chunk::<TAG_BYTES>()?;
        // Every byte is looked at, so that the time says nothing.
        let differing = tag(&self.receive, message)
            .iter()
            .zip(claimed)
            .fold(0, |sum, (a, b)| sum | (a ^ b));
        (differing == 0).then_some(message)
    }
}

/// Whether a stream that should be frames begins as TLS does.
#[must_use]
pub fn looks_like_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 3, 0..=4, ..])
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
