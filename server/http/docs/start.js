// Asks for the key where the server has one, keeps it in memory only, and shows openapi.json with Swagger UI.
"use strict";

const form = document.getElementById("ask");
const said = document.getElementById("said");
let key = "";

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function start() {
  let response;
  try {
    response = await fetch("openapi.json", { headers: headers() });
  } catch {
    form.hidden = false;
    said.textContent = "The server does not answer. Try again.";
    return;
  }
  if (response.status === 401) {
    form.hidden = false;
    said.textContent = key ? "This is not the key of this server." : "";
    return;
  }
  const spec = await response.json();
  if (!response.ok) {
    form.hidden = false;
    said.textContent = spec.error.message;
    return;
  }
  form.hidden = true;
  SwaggerUIBundle({
    spec,
    dom_id: "#api",
    validatorUrl: null,
    requestInterceptor: (request) => {
      Object.assign(request.headers, headers());
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = document.getElementById("key").value;
  start();
});
start();
