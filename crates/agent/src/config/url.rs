//! The URL of a flag server.

use std::fmt;

use hyper::Uri;

/// Where a flag server is: `http` or `https`, a host, perhaps a port, perhaps a path that requests are put below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    /// Whether it speaks TLS.
    pub(crate) tls: bool,
    /// A name or an address; an IPv6 address without its brackets.
    pub(crate) host: String,
    /// Its port.
    pub(crate) port: u16,
    /// What stands before the path of each request; empty, or it begins with a slash and does not end with one.
    pub(crate) base: String,
    text: String,
}

impl Url {
    /// The host, and the port where it is written: for the request's header.
    pub(crate) fn authority(&self) -> &str {
        let rest = self.text.split_once("://").map_or("", |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest)
    }
}

impl TryFrom<&str> for Url {
    type Error = String;

    fn try_from(text: &str) -> Result<Self, String> {
        let refuse = |what: &str| Err(format!("{what}: {text:?}"));
        let uri: Uri = match text.parse() {
            Ok(uri) => uri,
            Err(error) => return refuse(&format!("expected a URL ({error})")),
        };
        let (tls, port) = match uri.scheme_str() {
            Some("http") => (false, 80),
            Some("https") => (true, 443),
            _ => return refuse("expected a URL such as http://192.0.2.1:7500"),
        };
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return refuse("a URL must not hold credentials, use token_file");
        }
        if uri.query().is_some() || text.contains('#') {
            return refuse("only the base of the server's URL, without a query");
        }
        let host = uri.host().unwrap_or_default();
        // A port that is none is not a port that is absent.
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if host.is_empty() || (uri.port_u16().is_none() && authority != host) {
            return refuse("expected a host, and a port from 1 to 65535 where there is one");
        }
        Ok(Url {
            tls,
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(port),
            base: uri.path().trim_end_matches('/').to_owned(),
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_ports_and_bases() {
        for (text, tls, host, port, base, authority) in [
            ("http://10.0.0.1:7500", false, "10.0.0.1", 7500, "", "10.0.0.1:7500"),
            ("https://flags.example/", true, "flags.example", 443, "", "flags.example"),
            ("http://[::1]:80/a/b/", false, "::1", 80, "/a/b", "[::1]:80"),
        ] {
            let url = Url::try_from(text).unwrap();
            assert_eq!((url.tls, url.host.as_str(), url.port, url.base.as_str()), (tls, host, port, base));
            assert_eq!((url.authority(), url.to_string().as_str()), (authority, text));
        }
    }

    #[test]
    fn what_is_no_base_url_is_refused() {
        for text in [
            "",
            "http://",
            "ftp://x",
            "x",
            "/x",
            "http://a b",
            "http://u:p@x",
            "http://x?y",
            "http://x:99999",
            "http://x/#y",
        ] {
            assert!(Url::try_from(text).is_err(), "{text}");
        }
    }
}
